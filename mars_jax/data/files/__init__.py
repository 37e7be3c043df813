"""Files of samples: JSON texts and tables, read into rows."""
