"""Run trials in processes or on a cluster, and keep what is finished."""
