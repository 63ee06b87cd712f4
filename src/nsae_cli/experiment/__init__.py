"""`nsae run`: a YAML file that chains the commands' work by name."""
