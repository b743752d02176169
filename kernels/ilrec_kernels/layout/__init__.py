"""How tokens lie in memory: columns of the head, ragged lists, and the products over
them.
"""
