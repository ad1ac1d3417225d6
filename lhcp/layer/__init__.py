"""Where the two wings meet: the public functions and the module."""
