//! A small synchronous wrapper of rtnetlink: links, addresses, routes, neighbours, rules, tc.
