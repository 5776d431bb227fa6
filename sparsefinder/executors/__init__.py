"""Ways to multiply a layout: torch blocks, C++, Triton, LSG."""
