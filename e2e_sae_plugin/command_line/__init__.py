"""What the commands are and take. `commands` and all that it imports need neither torch nor SAELens, so that help and
refusals come at once."""
