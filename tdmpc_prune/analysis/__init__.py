"""What is found out about agents and their cuts: comparisons, sensitivity, stability, studies."""
