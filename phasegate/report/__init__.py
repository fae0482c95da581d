"""Draw the figures and write the page."""
