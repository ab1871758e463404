"""Run the worker without Ray, in this process or in processes of this machine."""
