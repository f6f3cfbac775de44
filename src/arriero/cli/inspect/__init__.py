"""`arriero inspect`: what a data set, checkpoint, run or directory of weights is, and whether it is whole."""
