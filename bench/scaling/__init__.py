"""What the cost model says of many ranks, and how far it is from what is measured."""
