def adapt_channels(kernel, channels):
    raise NotImplementedError
