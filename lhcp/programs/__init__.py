"""The console program `lhcp`: a file for each of its commands, with one function, `start`."""
