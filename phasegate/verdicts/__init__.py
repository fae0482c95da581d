"""Turn tables of trials into verdicts, summaries and sentences, without torch."""
