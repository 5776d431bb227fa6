"""A layout in dense blocks of torch products, on any device: `decompose` is the way in."""
