/* The agent's constants as symbols of a shared library. */
#include "weights.h"
