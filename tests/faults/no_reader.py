"""A run that prints to a pipe whose reader has left: its arguments are those of lhcp train."""

import os
import sys

reader, writer = os.pipe()
os.dup2(writer, 1)
os.close(reader)
os.execv(sys.executable, [sys.executable, "-m", "lhcp", "train", *sys.argv[1:]])
