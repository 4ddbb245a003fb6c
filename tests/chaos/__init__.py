"""What happens to the store, to its connections and to its writers, and what checks notice of it: nothing.

`make chaos` runs every scenario at length and prints a table; the tests run the same code for a few seconds each.
"""
