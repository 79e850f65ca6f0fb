"""Statistics of graded samples: arrays in, named tuples out. Import the modules by name."""
