"""How tables and figures look: colours, formats, rendering."""
