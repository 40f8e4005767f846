"""Resume of streams after the loss of their gateway. Each chunk of a stream carries a resume token, and a client can
continue its call at another gateway by presenting these tokens."""
