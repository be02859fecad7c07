"""What joins the stages: the command line, recipes, the demo and the benchmark."""
