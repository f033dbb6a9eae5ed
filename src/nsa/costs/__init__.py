"""What methods and models cost, counted from their sizes: keys read, floating-point operations, what devices do."""
