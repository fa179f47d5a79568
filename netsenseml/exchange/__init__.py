"""The compressed collective: which ranks exchange, how a tensor's mean is formed, and in which
order."""
