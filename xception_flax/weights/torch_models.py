"""placeholder until merged"""


def recognize(arrays, config, path):
    raise NotImplementedError
