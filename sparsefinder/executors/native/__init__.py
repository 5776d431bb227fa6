"""C++ for CPUs, compiled at first use: what torch's operations reach only through gathers, copies and padding."""
