"""Load data sets as their sources publish them, and prepare them; no pickle is loaded."""
