"""Calibration data, the layer-streaming executor, the observer, the profile.

Importing this package imports no torch; `profile` is numpy only.
"""
