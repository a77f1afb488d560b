"""Data: a party's data sets as batches in the plan's order, and real data sets that come with packages."""
