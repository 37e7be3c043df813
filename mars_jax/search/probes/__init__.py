"""The probe phase."""
