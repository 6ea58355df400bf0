"""How KV travels: frames, connection state, codecs, lanes. Sans-IO inside; shells only in lanes/, session, endpoint."""
