"""What the user's optimizers do to the weights: the form and the age of their weight decay."""
