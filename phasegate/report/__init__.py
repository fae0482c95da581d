"""The report: tables as text, figures, and the page that holds them all."""
