"""One training loop: an iterator of batches and a loss function. What is learned, and from what, is its caller's."""
