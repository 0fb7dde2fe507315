"""How tables and figures look: the styles of methods, figures on paper, and tables in four formats."""
