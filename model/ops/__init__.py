"""Formulas that some platforms compute faster in another form, each beside its plain form."""
