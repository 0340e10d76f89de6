# What the agent of one host needs of a Consul with ACLs on, and nothing more. Put the host's name in
# place of docker01: a host then writes no other host's record. With another --prefix, or behind
# consul://…/prefix, the keys change with it.
#
#   consul acl policy create -name ovnet-docker01 -rules @consul-policy.hcl
#   consul acl token create -policy-name ovnet-docker01

# Who is there. The sentinel is made by whoever comes first.
key_prefix "ovnet/v1/hosts/" {
  policy = "read"
}
key "ovnet/v1/hosts/.keep" {
  policy = "write"
}
key "ovnet/v1/hosts/docker01" {
  policy = "write"
}

# What hosts compete for.
key_prefix "ovnet/v1/networks/" {
  policy = "write"
}
key_prefix "ovnet/v1/vnis/" {
  policy = "write"
}
key_prefix "ovnet/v1/subnets/" {
  policy = "write"
}
key_prefix "ovnet/v1/endpoints/" {
  policy = "write"
}

# Networks that Docker is making here.
key_prefix "ovnet/v1/pending/docker01/" {
  policy = "write"
}

# The lease. A name in place of the empty one limits it to the Consul agent that this host asks.
session_prefix "" {
  policy = "write"
}
