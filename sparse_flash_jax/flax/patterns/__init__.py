"""What a layer may see, a module for each pattern; `flax/pattern.py` names them all."""
