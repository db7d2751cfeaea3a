"""From bare hosts to a running federation: one file describes it, certificates and start-up files follow from it."""
