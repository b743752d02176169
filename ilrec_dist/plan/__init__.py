"""What a training on a cluster takes, reckoned
from its configuration before anything starts.
"""
