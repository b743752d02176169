"""What several test files share: small data sets, models, runs, and how to ask for
them.
"""
