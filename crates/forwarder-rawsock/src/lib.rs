//! A forwarder on AF_PACKET sockets: any Linux, no kernel feature beyond raw sockets.
