"""Reports as text for people. Nothing here decides anything: what is shown stands in the report."""
