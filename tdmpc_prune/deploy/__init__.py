"""What is done with a finished agent: playing, fitting to a control rate, export, benchmark."""
