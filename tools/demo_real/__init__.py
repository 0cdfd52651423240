"""How the data of examples/real_demo were cut from public sets."""
