"""Models of other people as velocity fields, one file a family; none of them imports a model library."""
