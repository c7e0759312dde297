"""The commands of halos: one file each."""
