"""placeholder"""
class Generation: pass
