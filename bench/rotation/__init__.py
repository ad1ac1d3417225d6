"""What the rotation costs: measured, without messages, predicted, and beside other rings."""
