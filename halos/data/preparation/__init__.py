"""From files to prepared tables, with a report of what was left out."""
