"""verl: groups to tensors, the step loop, checkpoints, publishing."""
