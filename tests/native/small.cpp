extern "C" int seven() { return 7; }
