"""Tables, figures and claims that compare finished runs."""
