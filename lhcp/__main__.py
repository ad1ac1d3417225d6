"""`python -m lhcp`, and `torchrun -m lhcp`: the console program."""

from lhcp.programs.main import main

if __name__ == "__main__":
    main()
